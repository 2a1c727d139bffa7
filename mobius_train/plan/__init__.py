"""Peak memory: predicted before a launch."""

from mobius_train.plan.gpus import GPUS, Gpu, find_gpu
from mobius_train.plan.planner import Layout, Plan, Planner, plan

__all__ = ["GPUS", "Gpu", "Layout", "Plan", "Planner", "find_gpu", "plan"]
