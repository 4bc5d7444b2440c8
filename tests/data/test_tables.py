"""Parquet files, folders of shards, and what `datasets.save_to_disk` leaves."""

import numpy as np
import pyarrow as pa
import pytest

from dpdistill.data import load_images
from dpdistill.errors import InputError


def same(data, write, repeats=1):
    images, labels = write.toy()
    np.testing.assert_array_equal(data.images, np.concatenate([images] * repeats))
    np.testing.assert_array_equal(data.labels, np.concatenate([labels] * repeats))
    assert data.class_names == write.names


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"row_group_size": 2}, {"use_dictionary": False}])
def test_parquet_round_trip(tmp_path, write, nested, options):
    same(load_images(write.parquet(tmp_path / "x.parquet", write.table(nested=nested), **options)), write)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_arrow_round_trip_with_batches(tmp_path, write, rows):
    made = write.table().combine_chunks()
    batches = pa.Table.from_batches(made.to_batches(max_chunksize=rows), made.schema)
    same(load_images(write.arrow(tmp_path / "x.arrow", batches)), write)


def test_more_rows_than_one_batch(tmp_path, write):
    made = pa.concat_tables([write.table()] * 100)
    for data in (
        load_images(write.parquet(tmp_path / "x.parquet", made)),
        load_images(write.arrow(tmp_path / "x.arrow", made.combine_chunks())),
    ):
        same(data, write, 100)


def test_colour(tmp_path, write):
    data = load_images(write.parquet(tmp_path / "x.parquet", write.table(channels=3)))
    np.testing.assert_array_equal(data.images, write.toy(channels=3)[0])


@pytest.mark.parametrize("folder", ["", "data", "train"])
def test_shards_are_joined_in_order(tmp_path, write, folder):
    (tmp_path / "set" / folder).mkdir(parents=True)
    for i in range(2):
        write.parquet(tmp_path / "set" / folder / f"train-0000{i}-of-00002.parquet")
    same(load_images(tmp_path / "set"), write, 2)


def test_shards_of_splits(tmp_path, write):
    write.parquet(tmp_path / "train-00000-of-00001-0123abcd.parquet")
    write.parquet(tmp_path / "test-00000-of-00001.parquet", write.table(channels=3))
    same(load_images(tmp_path), write)
    assert load_images(tmp_path, split="test").image_shape == (3, 8, 8)
    with pytest.raises(InputError, match="splits found: test, train"):
        load_images(tmp_path, split="val")


def test_unnamed_parts_are_one_data_set(tmp_path, write):
    for i in range(3):
        write.parquet(tmp_path / f"part-{i}.parquet")
    same(load_images(tmp_path), write, 3)


def test_save_to_disk_of_one_split_and_of_several(tmp_path, write):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "state.json").write_text("{}")
        (tmp_path / part / "dataset_info.json").write_text("{}")
        for i in range(2):
            write.arrow(tmp_path / part / f"data-0000{i}-of-00002.arrow")
    (tmp_path / "dataset_dict.json").write_text("{}")
    same(load_images(tmp_path / "test"), write, 2)
    same(load_images(tmp_path), write, 2)
    same(load_images(tmp_path, split="test"), write, 2)


def test_class_list_must_be_declared_without_metadata(tmp_path, write):
    path = write.parquet(tmp_path / "x.parquet", write.table(hf=False))
    with pytest.raises(InputError, match="private"):
        load_images(path)
    same(load_images(path, class_names=write.names), write)


def test_text_labels_need_the_class_list(tmp_path, write):
    text = pa.array([write.names[k] for k in write.toy()[1]])
    path = write.parquet(tmp_path / "x.parquet", write.table(hf=False, label=text))
    with pytest.raises(InputError, match="text labels"):
        load_images(path)
    same(load_images(path, class_names=write.names), write)
    with pytest.raises(InputError, match="outside the class list") as caught:
        load_images(path, class_names=["cat", "dog"])
    assert "eel" not in str(caught.value)


def test_other_column_names(tmp_path, write):
    made = write.table(hf=False).rename_columns(["img", "fine_label"])
    path = write.parquet(tmp_path / "x.parquet", made)
    with pytest.raises(InputError, match="columns: img, fine_label; --set image_column=NAME"):
        load_images(path, class_names=write.names)
    same(load_images(path, class_names=write.names, image_column="img", label_column="fine_label"), write)


@pytest.mark.parametrize("ids", [[7, 7, 8, 9, 7, 8], ["ann", "ann", "bob", "", "ann", "bob"]])
def test_ids_of_parquet(tmp_path, write, ids):
    path = write.parquet(tmp_path / "x.parquet", write.table(person=pa.array(ids)), row_group_size=2)
    data = load_images(path, id_column="person")
    same(data, write)
    assert data.ids.tolist() == [str(each) for each in ids]
    assert load_images(path).ids is None


@pytest.mark.parametrize(
    ("ids", "column", "match"),
    [
        (pa.array([1, None, 2, 3, 4, 5]), "person", "missing"),
        (pa.array([0.5] * 6), "person", "does not hold ids"),
        (pa.array(["x" * 201] * 6), "person", "more than 200 characters"),
        (pa.array([1] * 6), "patient", "has not one column 'patient'.*--set id_column=NAME"),
        (pa.array([1] * 6), "label", "says nothing of whose record"),
    ],
)
def test_ids_that_are_none(tmp_path, write, ids, column, match):
    path = write.parquet(tmp_path / "x.parquet", write.table(person=ids))
    with pytest.raises(InputError, match=match):
        load_images(path, id_column=column)


def test_ids_of_arrow_are_not_read(tmp_path, write):
    made = write.table(person=pa.array([1] * 6))
    with pytest.raises(InputError, match="save it as Parquet"):
        load_images(write.arrow(tmp_path / "x.arrow", made), id_column="person")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_other_columns_are_stepped_over(tmp_path, write, kind):
    extra = {
        "text": pa.array(["p", None, "", "q", "r", "s"]),
        "list": pa.array([[1], [], None, [2, 3], [4], [5]]),
        "deep": pa.array([{"a": [{"b": 1.5}], "c": True}] * 6),
        "fixed": pa.array([[1, 2]] * 6, pa.list_(pa.int8(), 2)),
        "when": pa.array([0] * 6, pa.timestamp("s")),
        "map": pa.array([[("k", 1)]] * 6, pa.map_(pa.string(), pa.int64())),
    }
    made = write.table(**extra, large=pa.array(["x"] * 6, pa.large_string()), none=pa.nulls(6))
    order = ["text", "list", "deep", "image", "fixed", "when", "map", "large", "none", "label"]
    same(load_images(getattr(write, kind)(tmp_path / f"x.{kind}", made.select(order))), write)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("label", [pa.int8(), pa.uint16(), pa.int32(), pa.large_string()])
@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary()])
def test_types(tmp_path, write, kind, label, image):
    plain = write.table(nested=False)
    labels = plain["label"].combine_chunks()
    text = pa.types.is_large_string(label)
    labels = pa.array([write.names[k] for k in labels.to_pylist()], label) if text else labels.cast(label)
    made = write.table(image=plain["image"].cast(image), label=labels)
    path = getattr(write, kind)(tmp_path / f"x.{kind}", made)
    same(load_images(path, class_names=write.names), write)


def test_images_of_other_sizes_are_resized(tmp_path, write):
    assert load_images(write.parquet(tmp_path / "x.parquet"), resize=20).image_shape == (1, 20, 20)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "labels", [None, pa.array([-1] * 6), pa.array(["?"] * 6), pa.array([0.5] * 6), pa.array([None, 1, 1, 1, 1, 1])]
)
def test_labels_of_no_kind_are_needed_where_none_are_read(tmp_path, write, kind, labels):
    made = write.table().drop_columns("label") if labels is None else write.table(label=labels)
    path = getattr(write, kind)(tmp_path / f"x.{kind}", made)
    if labels is None:
        with pytest.raises(InputError, match=r"has not one column 'label'.*--unlabelled"):
            load_images(path)
    data = load_images(path, unlabelled=True)
    np.testing.assert_array_equal(data.images, write.toy()[0])
    assert (data.labels.tolist(), data.class_names) == ([0] * 6, ("image",))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("nested", [True, False])
def test_the_only_column_of_images_needs_no_name(tmp_path, write, kind, nested):
    def read(made):
        return load_images(
            getattr(write, kind)(tmp_path / f"x.{kind}", made), image_column=None, class_names=write.names
        )

    made = write.table(nested=nested, text=pa.array(["p"] * 6))
    same(read(made), write)
    renamed = made.rename_columns(["img", "label", "text"])
    same(read(renamed), write)
    thumb = pa.array([b"x"] * 6)
    same(read(made.append_column("thumb", thumb)), write)
    with pytest.raises(InputError, match=r"has not one column of encoded images.*img, thumb; call one 'image'"):
        read(renamed.append_column("thumb", thumb))
    with pytest.raises(InputError, match=r"such columns: none"):
        read(made.drop_columns("image"))
