"""What `qat` returns."""

from dataclasses import dataclass

from tflite_export.latency import Latency
from tflite_export.parity import OutputParity
from tflite_export.records import Record, aligned, size_text


@dataclass(frozen=True)
class QatReport(Record):
    """What `qat` trained, wrote and measured. Prints itself; `to_json()` gives all fields.

    Attributes:
        path, bytes: of the int8 file.
        measure: "accuracy" (fraction right; more is better) or "loss" (less is better), of the next three.
        float_before: of the Keras model as it was passed.
        fake_quantised: of the network trained on fake quantization, still in floats.
        int8_file: of the file, run by LiteRT. All three on the validation data; None without any.
        validation_samples: how many.
        parity: file against the fake-quantised network, an OutputParity for each output.
        operators: name -> count, of the file.
        epochs: one dict of figures for each.
        samples: trained on.
        loss: what was minimised.
        latency: on this machine; None if runs=0.
        seconds: of each stage: store, prepare, train, convert, measure.
        notes: what the user should know, one sentence each.
        versions: package -> version.
    """

    path: str
    bytes: int
    measure: str
    float_before: float | None
    fake_quantised: float | None
    int8_file: float | None
    validation_samples: int
    parity: tuple[OutputParity, ...]
    operators: dict[str, int]
    epochs: tuple[dict[str, float], ...]
    samples: int
    loss: str
    latency: Latency | None
    seconds: dict[str, float]
    notes: tuple[str, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        def figure(value: float | None) -> str:
            if value is None:
                return "not measured (no validation data)"
            return f"{100 * value:.2f} %" if self.measure == "accuracy" else f"{value:.5g}"

        counts = ", ".join(f"{name} {count}" for name, count in self.operators.items())
        rows = [
            ("file", self.path),
            ("size", size_text(self.bytes)),
            ("trained", f"{len(self.epochs)} epochs on {self.samples} samples, {self.loss}"),
            (self.measure, f"on {self.validation_samples} samples"),
            ("  float model", figure(self.float_before)),
            ("  fake-quantised", figure(self.fake_quantised)),
            ("  int8 file", figure(self.int8_file)),
            ("operators", f"{sum(self.operators.values())}: {counts}"),
        ]
        rows += [(f"parity {each.name}", str(each)) for each in self.parity]
        rows += [("note", note) for note in self.notes]
        rows.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())))
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())))
        return "\n".join([aligned(rows)] + ([str(self.latency)] if self.latency else []))
