"""The algorithm itself: update equations, penalty schedules and preconditioners. Imports torch alone."""
