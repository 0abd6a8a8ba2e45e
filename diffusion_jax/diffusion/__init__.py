"""The forward process and what a network learns from it: schedules, grids, predictions, losses."""
