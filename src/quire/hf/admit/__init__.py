"""Which models run on pages: what is refused, and the rehearsal that proves the rest."""
