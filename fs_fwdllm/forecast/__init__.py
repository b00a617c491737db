"""What a run will cost, before it is run: parameters, passes, bytes and memory."""
