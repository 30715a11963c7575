"""Tests of how a mesh is written."""

from absl.testing import absltest, parameterized

from tools.plan import mesh, refusal


class MeshTest(parameterized.TestCase):
  def test_nothing_is_one_device(self):
    self.assertEqual(mesh.parse("").devices, 1)

  def test_batch_is_split_over_three_axes(self):
    axes = mesh.parse("data=2,fsdp=3,expert=5,tensor=7,sequence=11")
    self.assertEqual(axes.batch, 30)
    self.assertEqual(axes.devices, 30 * 77)

  @parameterized.parameters("fsdp", "fsdp=x", "rows=2", "fsdp=2,fsdp=2")
  def test_refuses_what_is_no_mesh(self, text):
    with self.assertRaisesRegex(refusal.Refused, f"but got `{text}`"):
      mesh.parse(text)

  def test_refuses_no_devices(self):
    with self.assertRaisesRegex(refusal.Refused, "at least 1, but got 0"):
      mesh.parse("data=0")


if __name__ == "__main__":
  absltest.main()
