"""The house: its rooms by floor. A room may import rooms on the floors below it."""

FLOORS = (
    ("arguments", "errors", "pytrees", "tensors", "testing"),
    ("constraints", "linear_solve", "undo"),
    ("curvature", "evaluation", "nn"),
    ("levels", "metrics", "multipliers", "newton", "workers"),
    ("penalties",),
    ("adapters", "hypergradients"),
    ("checks", "functional"),
    ("optimizers",),
    ("integrations",),
)

LAYERS = {
    room: {below for lower in FLOORS[:floor] for below in lower}
    for floor, rooms in enumerate(FLOORS)
    for room in rooms
}
