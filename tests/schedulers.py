"""A pipeline with any scheduler: of first and second order, with and without repeated timesteps or noise."""

import diffusers
from diffusers import DiffusionPipeline
from pipelines import build
from tiny_models import BETAS

SCHEDULERS = {
    "DDIM": {"clip_sample": False},
    "DDPM": {"clip_sample": False},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "HeunDiscrete": {},
    "KDPM2Discrete": {},
    "KDPM2AncestralDiscrete": {},
    "PNDM": {"skip_prk_steps": True},
    "UniPCMultistep": {},
    "DPMSolverMultistep": {},
    "DPMSolverSinglestep": {},
    "DEISMultistep": {},
    "LCM": {},
}


def with_scheduler(kind: str) -> DiffusionPipeline:
    pipe = build("sd")
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler")(**BETAS, **SCHEDULERS[kind])
    return pipe
