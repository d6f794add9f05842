"""Stage one: unlabelled images -> a backbone."""
