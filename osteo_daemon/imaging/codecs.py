"""Which library decodes which transfer syntax; only permissively licensed ones, see docs/decisions/0001-libraries.md.

pydicom tries every library it finds, GDCM's old OpenJPEG before the present one. Here each syntax has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

_OWN = "osteo"

DECODERS: Mapping[UID, str] = MappingProxyType(
    {
        RLELossless: "pydicom",
        JPEGBaseline8Bit: "gdcm",
        JPEGExtended12Bit: _OWN,
        JPEGLossless: "gdcm",
        JPEGLosslessSV1: "gdcm",
        JPEGLSLossless: "pyjpegls",
        JPEGLSNearLossless: "pyjpegls",
        JPEG2000Lossless: "pylibjpeg",
        JPEG2000: "pylibjpeg",
        HTJ2KLossless: "pylibjpeg",
        HTJ2KLosslessRPCL: "pylibjpeg",
        HTJ2K: "pylibjpeg",
    }
)
"""pydicom's name of the decoder of each compressed transfer syntax."""

DECODER_DEPENDENCIES = {JPEGExtended12Bit: ("python-gdcm>=3.0.24",)}
"""As pydicom asks it of a decoder's module."""


def choose_decoders() -> None:
    """Leave each syntax its one decoder, for this process; for one that decodes and does nothing else."""
    for syntax, name in DECODERS.items():
        decoder = get_decoder(syntax)
        if name == _OWN and _OWN not in decoder.available_plugins:
            decoder.add_plugin(_OWN, (__name__, decode_extended_jpeg.__name__))
        for other in decoder.available_plugins:
            if other != name:
                decoder.remove_plugin(other)


def is_available(syntax: str) -> bool:
    """As pydicom asks it of a decoder's module."""
    return syntax == JPEGExtended12Bit and "gdcm" in get_decoder(JPEGBaseline8Bit).available_plugins


def decode_extended_jpeg(source: bytes, runner: Any) -> bytes:
    """One frame of JPEG Extended, of 8 or 12 bits; pydicom leaves those of 12 to no library.

    Args:
        source: the frame as encoded.
        runner: pydicom's `DecodeRunner`, which knows the image.

    Raises:
        ValueError: it cannot be decoded.
    """
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(
        gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.GetPIType(str(runner.photometric_interpretation)))
    )
    if runner.samples_per_pixel > 1:
        image.SetPlanarConfiguration(runner.planar_configuration)
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    stored = runner.bits_stored
    image.SetPixelFormat(
        gdcm.PixelFormat(
            runner.samples_per_pixel, runner.bits_allocated, stored, stored - 1, runner.pixel_representation
        )
    )
    # bytes come as text, each wrong one escaped
    return bytes(image.GetBuffer().encode("utf-8", "surrogateescape"))
