"""What pip is told of a source distribution that is not built."""

from tools.build_defs import pkg_info_backend


def test_metadata_is_that_of_the_archive(tmp_path, monkeypatch):
  source, metadata = tmp_path / "source", tmp_path / "metadata"
  source.mkdir()
  text = "Metadata-Version: 2.4\nName: some-library\nVersion: 1.2.3\n\nWords.\n"
  (source / "PKG-INFO").write_text(text)
  monkeypatch.chdir(source)  # where pip calls it
  folder = pkg_info_backend.prepare_metadata_for_build_wheel(str(metadata))
  assert folder == "some_library-1.2.3.dist-info"
  assert (metadata / folder / "METADATA").read_text() == text
