"""The mixture of sources with other libraries' models and loops, one screen each."""
