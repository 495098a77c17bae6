"""CT slices made to order, as the bytes of DICOM files of any transfer syntax."""

import io

import cv2
import numpy as np
import pydicom
from lossless_jpeg_encoder import encode
from pydicom.encaps import encapsulate

AXIAL = (1, 0, 0, 0, 1, 0)
IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
JPEG_LOSSLESS, JPEG_2000 = "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90"


def encode_pixels(dataset, stored, syntax, bits):
    """Put stored values (..., rows, columns) into a dataset, compressed as the syntax
    wants."""
    frames = stored.reshape(-1, *stored.shape[-2:])
    unsigned = (frames.astype(np.int64) & (2**bits - 1)).astype(np.uint16)
    if syntax == JPEG_LOSSLESS:
        streams = [encode(frame, bits, 1, table="optimal") for frame in unsigned]
    elif syntax == JPEG_2000:
        how = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
        streams = [cv2.imencode(".jp2", frame, how)[1].tobytes() for frame in unsigned]
        streams = [stream[stream.index(b"\xff\x4f\xff\x51") :] for stream in streams]
    else:
        dataset.PixelData = stored.astype(">u2" if syntax == BIG else "<u2").tobytes()
        dataset["PixelData"].VR = "OW"
        return
    dataset.PixelData = encapsulate(streams)
    dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB"


def dicom_bytes(
    stored,
    position,
    directions=AXIAL,
    spacing=(0.5, 0.5),
    signed=False,
    slope=1,
    intercept=-1024,
    bits=16,
    syntax=EXPLICIT,
    series="1.2.3.1",
    number=1,
    **tags,
):
    """One CT file as bytes. A tag given as None is left out; position or directions may be
    None."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(
        EXPLICIT if syntax == RLE else syntax
    )
    frames = dict(NumberOfFrames=len(stored)) if stored.ndim == 3 else {}
    values = dict(
        SOPClassUID=pydicom.uid.CTImageStorage,
        SOPInstanceUID=f"1.2.3.9.{number}",
        StudyInstanceUID="1.2.3",
        SeriesInstanceUID=series,
        InstanceNumber=number,
        ImagePositionPatient=position,
        ImageOrientationPatient=directions,
        PixelSpacing=spacing,
        Rows=stored.shape[-2],
        Columns=stored.shape[-1],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=bits,
        HighBit=bits - 1,
        PixelRepresentation=int(signed),
        RescaleSlope=slope,
        RescaleIntercept=intercept,
    )
    for name, value in (values | frames | tags).items():
        if value is not None:
            setattr(
                dataset,
                name,
                list(value) if isinstance(value, (tuple, np.ndarray)) else value,
            )
    encode_pixels(dataset, stored, syntax, bits)
    if syntax == RLE:
        dataset.compress(RLE, encoding_plugin="pydicom", generate_instance_uid=False)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def item(**tags):
    """An item of a sequence."""
    dataset = pydicom.Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset
