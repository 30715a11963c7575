"""A build backend that builds nothing: metadata as the archive states it.

pip asks for a source distribution's metadata even where only its files are
wanted, and would fetch and run what the distribution is built with to get it.
"""

import email
import pathlib


def prepare_metadata_for_build_wheel(
  metadata_directory: str, config_settings: object = None
) -> str:
  """Copies what is in the archive's PKG-INFO; returns the folder's name."""
  text = pathlib.Path("PKG-INFO").read_text("utf-8")
  fields = email.message_from_string(text)
  name = fields["Name"].replace("-", "_")
  folder = pathlib.Path(
    metadata_directory, f"{name}-{fields['Version']}.dist-info"
  )
  folder.mkdir(parents=True)
  (folder / "METADATA").write_text(text, "utf-8")
  return folder.name
