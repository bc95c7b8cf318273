"""What a step must be able to put back: buffers, random numbers, values, the memory of rules."""
