"""Settings of a diffusion model that is made in a second, for tests that ask whether it is made and not how well it draws."""

from typing import Any

NETWORK: dict[str, Any] = {"patch": 4, "width": 8, "depth": 1, "heads": 2}
SAMPLER: dict[str, Any] = {
    "seed_images": 12,
    "sampling_steps": 2,
    "student_width": 8,
    "student_steps": 3,
    "student_batch": 8,
    "critic_width": 4,
    "pool": 8,
    "answer_steps": 2,
}
