"""What the notebook runs in one line: the check of the machine, the wait for the first token, metrics, figures."""
