"""The stages lie at the top of the checkout and are installed as `modicum.pretrain`, `modicum.finetune`, ...

A static list in pyproject.toml would silently drop new sub-packages, so the list is found at build time.
"""

from setuptools import find_packages, setup

STAGES = ["pretrain", "finetune", "evaluate", "pipelines", "configs"]

setup(
    packages=[
        *find_packages(include=["modicum", "modicum.*"]),
        *(f"modicum.{name}" for stage in STAGES for name in find_packages(include=[stage, f"{stage}.*"])),
    ],
    package_dir={"modicum": "modicum", **{f"modicum.{stage}": stage for stage in STAGES}},
    package_data={
        "modicum": ["py.typed"],
        "modicum.configs": ["*.yaml"],
        "modicum.configs.recipes": ["*.yaml"],
        "modicum.evaluate.report": ["*.jinja", "*.css"],
        "modicum.pipelines": ["*.sh", "*.sbatch"],
    },
)
