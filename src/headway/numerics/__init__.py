"""Numerical machinery that methods of several packages share."""
