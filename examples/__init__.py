"""Problems on real data; each is a command."""
