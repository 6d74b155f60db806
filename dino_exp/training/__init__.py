"""The training loop: one step as a transaction, the loop around it, and the state that a resume needs."""
