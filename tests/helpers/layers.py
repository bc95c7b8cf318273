"""The house: its rooms by floor. A room may import rooms on the floors below it.

``__main__`` is no room: like a user's program, it imports what the package shows.
"""

FLOORS = (
    ("arguments", "errors", "pytrees", "tensors", "testing"),
    ("constraints", "linear_solve", "undo"),
    ("curvature", "evaluation", "nn"),
    ("levels", "metrics", "multipliers", "newton", "workers"),
    ("penalties",),
    ("adapters", "hypergradients"),
    ("checks", "functional"),
    ("optimizers", "plotting"),
    ("integrations",),
)

LAYERS = {
    room: {below for lower in FLOORS[:floor] for below in lower}
    for floor, rooms in enumerate(FLOORS)
    for room in rooms
}
