"""Documents that `neox prepare` leaves out: duplicates, near-duplicates, text of evaluation sets."""
