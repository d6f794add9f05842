"""The stages chained: `modicum run`, `modicum sweep`, and the same as plain shell."""
