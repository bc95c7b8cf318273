"""The published synthetic problems: six formulas, known solutions."""
