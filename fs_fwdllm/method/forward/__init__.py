"""Forward gradients: clients look and stay where they are, the server steps on what all of them saw."""
