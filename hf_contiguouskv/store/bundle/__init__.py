"""Bundles: stored prefixes as one folder that can be copied, uploaded to the Hugging Face Hub, and imported elsewhere.

    README.md                   a card: what is in it and how to load it
    segments/KEY.safetensors    the segments, byte for byte
    bundle.json                 lists them, with a SHA-256 each; written last

What `import_bundle` reads is untrusted: names come from checked keys only, links are refused, every byte is compared
with its checksums, and each segment must continue one of the same model at the right place.
"""

from .exporting import ExportReport, export_bundle
from .importing import ImportReport, RefusedSegment, import_bundle
from .manifest import BundledSegment, BundleError, read_manifest

__all__ = [
    "BundleError",
    "BundledSegment",
    "ExportReport",
    "ImportReport",
    "RefusedSegment",
    "export_bundle",
    "import_bundle",
    "read_manifest",
]
