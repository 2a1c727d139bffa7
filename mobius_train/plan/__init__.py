"""Prediction of peak memory before a launch."""

from mobius_train.engine.spread import Spread
from mobius_train.plan.gpus import GPUS, Gpu, find_gpu
from mobius_train.plan.planner import Plan, Planner, plan

__all__ = ["GPUS", "Gpu", "Plan", "Planner", "Spread", "find_gpu", "plan"]
