import fsspec
import pytest

from rmdd.config import ConfigError, Data, load
from rmdd.data.ingest import ingest
from rmdd.data.inputs import RemotePath, find, input_path


@pytest.fixture
def memory():
    """Fixture: an empty in-memory store. Unlike S3, pyarrow can read it only through fsspec."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def upload(fs, root, bucket):
    for file in root.rglob("*"):
        if file.is_file():
            fs.pipe(f"/{bucket}/{file.relative_to(root).as_posix()}", file.read_bytes())


@pytest.fixture
def data(root, draw, put):
    draw("a.png", "sub/b.png", "c d#1.png")
    put("annotations/train.json", [{"image": n, "caption": n} for n in ("a.png", "sub/b.png", "c d#1.png", "gone.png")])
    return Data(source="lists", root=str(root), annotations={"train": "annotations/train.json"})


def test_every_file_system_gives_the_same_dataset(data, root, memory, tmp_path):
    upload(memory, root, "bucket/deep")
    local = ingest(data, tmp_path / "local")
    assert local.counts["train"]["pairs"] == 3 and local.manifest["quarantine"] == {"missing_file": 1}
    for scheme, uri in {"file": f"file://{root}", "memory": "memory://bucket/deep/"}.items():
        remote = ingest(data.model_copy(update={"root": uri}), tmp_path / scheme)
        assert remote.hash == local.hash and remote.manifest["quarantine"] == {"missing_file": 1}
        assert ingest(data.model_copy(update={"root": uri}), tmp_path / scheme).manifest == remote.manifest


def test_a_bucket_of_s3(data, root, tmp_path, monkeypatch):
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "key",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        from pyarrow import fs

        s3 = fs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        s3.create_dir("bucket")
        for file in root.rglob("*.*"):
            with s3.open_output_stream(f"bucket/deep/{file.relative_to(root).as_posix()}") as out:
                out.write(file.read_bytes())
        uri = "s3://bucket/deep?region=us-east-1"
        assert find(input_path(uri), "**/*.json")[0][0] == "annotations/train.json"
        remote = ingest(data.model_copy(update={"root": uri}), tmp_path / "s3")
        assert remote.hash == ingest(data, tmp_path / "local").hash
        with pytest.raises(ValueError, match="data.root s3://bucket/nothing is not a folder"):
            ingest(data.model_copy(update={"root": "s3://bucket/nothing?region=us-east-1"}), tmp_path / "out")
    finally:
        server.stop()


def test_patterns_find_files_on_every_store(root, memory):
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "deep/er/b.tar", "c.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))
    upload(memory, root, "bucket")
    for where in (input_path(str(root)), input_path("memory://bucket")):
        assert [name for name, _ in find(where, "**/*.tar")] == ["a-000.tar", "a-001.tar", "a-002.tar", "deep/er/b.tar"]
        assert find(where, "*.tar") == [(f"a-{i:03d}.tar", 9) for i in range(3)]
        assert find(where, "a-{001..002}.tar::c.{txt,txt}") == [("a-001.tar", 9), ("a-002.tar", 9), ("c.txt", 5)]
        with pytest.raises(ValueError, match=r"a-003.tar is missing but 'a-\{000..003\}.tar' names it"):
            find(where, "a-{000..003}.tar")


def test_a_remote_path_can_be_pickled_and_joined(memory):
    import pickle

    memory.pipe("/bucket/annotations/x.json", b"[]")
    where = pickle.loads(pickle.dumps(input_path("memory://bucket/images")))
    file = where / "../annotations/x.json"
    assert isinstance(where, RemotePath) and str(file).endswith("bucket/annotations/x.json")
    assert (file.name, file.stem, file.suffix) == ("x.json", "x", ".json")
    assert file.is_file() and not where.is_file() and (where / "../annotations").is_dir()
    assert file.read_bytes() == b"[]"


def test_roots_that_cannot_be_read_are_reported(tmp_path):
    for root, words in {
        "nonsense://bucket": "nonsense://bucket cannot be opened: .*fsspec",
        "memory://nothing-here": "is not a folder",
    }.items():
        with pytest.raises(ValueError, match=words):
            ingest(Data(source="table", root=root), tmp_path / "out")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://id:hunter2@bucket/x",
        "s3://bucket/x?secret_key=hunter2",
        "hdfs://me:hunter2@host/x",
        "gs://b?access_token=hunter2",
        "abfs://c@account.dfs.core.windows.net/x?sv=2024-11-04&se=2030-01-01&sp=r&sig=hunter2",
        "https://host/x?key=hunter2",
    ],
)
def test_credentials_in_a_run_file_are_refused(uri):
    with pytest.raises(ConfigError, match="contains a password or key") as error:
        load({"data": {"source": "table", "root": uri}})
    assert "hunter2" not in str(error.value)
    load({"data": {"source": "table", "root": "hdfs://me@host:9000/x?replication=1"}})


def test_reading_retries_and_its_error_names_the_remedy(memory, monkeypatch):
    memory.pipe("/bucket/a.json", b"[]")
    file = input_path("memory://bucket") / "a.json"
    failures = [OSError("reset by peer")] * 2
    real = file.store.fs

    class Flaky:
        def open_input_stream(self, path):
            if failures:
                raise failures.pop()
            return real.open_input_stream(path)

    monkeypatch.setattr("rmdd.core.remote.time.sleep", lambda seconds: None)
    monkeypatch.setattr(file.store, "fs", Flaky())
    assert file.read_bytes() == b"[]" and not failures
    failures += [OSError("gone")] * 4
    with pytest.raises(OSError, match="cannot read memory://bucket/a.json: gone; check the bucket"):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        (file / "../b.json").read_bytes()
