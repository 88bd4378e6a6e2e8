"""Run many trainings as processes: sweeps, studies, searches."""
