"""Peak memory: predicted before a launch."""

from mobius_train.memory.gpus import GPUS, Gpu, find_gpu
from mobius_train.memory.plan import Layout, Plan, Planner, plan

__all__ = ["GPUS", "Gpu", "Layout", "Plan", "Planner", "find_gpu", "plan"]
