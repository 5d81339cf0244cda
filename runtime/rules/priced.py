"""Transition: the former name of walk_points."""

from offramp.runtime.rules.walk_points import WalkPoint, choose_walk_points

choose = choose_walk_points
__all__ = ["WalkPoint", "choose"]
