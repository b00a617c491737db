"""A run on any host: what a process opens, rounds as the server sees them, checkpoints, accounting, the local loop."""
