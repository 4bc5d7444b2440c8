"""Ways to a student model: a private teacher, votes, a teacher of known guarantee, and the paper's way with an opaque one."""
