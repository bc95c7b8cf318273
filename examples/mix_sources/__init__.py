"""The mixture of training sources of a language model, learned from a small clean set."""
