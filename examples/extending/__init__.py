"""A penalty, a multiplier rule and an engine of one's own, each a complete file."""
