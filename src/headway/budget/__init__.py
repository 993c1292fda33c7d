"""Estimators and planners: measurements and a budget in, a prediction or a plan out."""
