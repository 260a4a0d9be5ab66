"""Print ``name==version`` of the packages an image brings and pip must leave alone.

python docker/keep.py > keep.txt && pip install -c keep.txt .

``pip freeze`` cannot be used: it prints packages of NVIDIA's images as ``name @ file:...``.
"""

from importlib import metadata

KEPT = ("torch", "triton", "transformer-engine", "transformer-engine-torch", "numpy")

for name in KEPT:
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        continue
