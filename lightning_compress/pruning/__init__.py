"""Pruning: scores, masks, schedules, and the callbacks that apply them while a model trains."""
