"""gpujobd-notify: tells people and programs what becomes of jobs. A client of the daemon's events, and nothing else of it."""
