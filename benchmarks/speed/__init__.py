"""What a step costs: time, operations, memory, and how they grow."""
