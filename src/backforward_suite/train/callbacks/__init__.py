"""What happens beside training: the record of a run and its checkpoints."""
