"""How good is a model? Metrics of classes and tokens, comparison of answers, and generated answers."""
