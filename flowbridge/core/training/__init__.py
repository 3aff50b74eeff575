"""The training loop and what it needs: objectives, schedules, random streams, held-out tracking, checkpoints, processes."""
