import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithBundles(build_py):
    """Put the bundles inside an installed package: only an editable one has them beside it."""

    def run(self) -> None:
        """Build the package, and copy the bundles into it."""
        super().run()
        if not self.editable_mode:
            into = Path(self.build_lib) / "monai_rl_reg" / "bundles"
            shutil.copytree(Path(__file__).with_name("bundles"), into, dirs_exist_ok=True)


images = ["torchvision", "pillow", "scikit-image", "scikit-learn", "lpips", "opencv-python-headless", "av"]
test = [*images, "pytest>=8", "pytest-xdist>=3.5", "jsonschema", "mlflow>=2.15", "ruff>=0.8", "mypy>=1.10"]
# its own environment: MONAI Label needs numpy below 2, and starts with these versions only (its issue 1841)
label = ["monailabel==0.8.5", "pydicom<3", "pynetdicom<3", "dicomweb-client[gcp]<0.60"]
docs = ["sphinx>=7", "myst-parser>=3", "furo", "sphinx-mathjax-offline"]

setup(
    name="monai_rl_reg",
    version="0.1.0",
    description="Stepwise registration and image-to-image translation by reinforcement learning, as MONAI bundles",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["monai_rl_reg", "monai_rl_reg.*"]),
    package_data={"monai_rl_reg": ["report.html"]},
    cmdclass={"build_py": BuildWithBundles},
    python_requires=">=3.10",
    install_requires=[
        "monai>=1.5",
        "torch>=2.4",
        "nibabel",
        "SimpleITK",
        "itk",
        "numpy",
        "fire",
        "isal",
        "matplotlib",
        "psutil",
        "pytorch-ignite",
        "scipy",
        "tensorboard",
        "tqdm",
    ],
    extras_require={"images": images, "label": label, "test": test, "docs": docs},
)
