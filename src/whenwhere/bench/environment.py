"""Where numbers were measured: hardware, versions, threads, date."""

import os
import platform
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch as pytorch


@dataclass(frozen=True)
class Environment:
    """One machine at one time.

    Attributes:
        date: day and time of the first measurement, in UTC.
        processor: its model's name, and `cores` how many of it the system sees.
        device: the accelerator, or "cpu".
        threads: that PyTorch computes with on the CPU.
        system: operating system and architecture.
        python, torch, diffusers, transformers, whenwhere: versions.
    """

    date: str
    processor: str
    cores: int
    device: str
    threads: int
    system: str
    python: str
    torch: str
    diffusers: str
    transformers: str
    whenwhere: str

    @classmethod
    def here(cls, device: pytorch.device) -> Self:
        """This machine, now."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            processor=_processor(),
            cores=os.cpu_count() or 1,
            device=pytorch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=pytorch.get_num_threads(),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=pytorch.__version__,
            diffusers=version("diffusers"),
            transformers=version("transformers"),
            whenwhere=version("whenwhere"),
        )

    def differences(self, other: "Environment") -> list[str]:
        """What is not the same in two environments, but for the date."""
        dated = replace(other, date=self.date)
        names = [field.name for field in fields(self)]
        return [
            f"{name} {getattr(self, name)} and {getattr(dated, name)}"
            for name in names
            if getattr(self, name) != getattr(dated, name)
        ]

    def __str__(self) -> str:
        where = self.processor if self.device == "cpu" else f"{self.device}, {self.processor}"
        return (
            f"{where}, {self.threads} thread{'s' if self.threads != 1 else ''}, torch {self.torch}, "
            f"diffusers {self.diffusers}, {self.date[:10]}"
        )


def _processor() -> str:
    """The model's name of the processor, where the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
