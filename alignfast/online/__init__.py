"""The online loop: a model is served, people judge its answers, and what they say is learned from."""
