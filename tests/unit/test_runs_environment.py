import json
import subprocess
import sys

import pytest

from dino_exp.runs.environment import environment_record
from dino_exp.runs.redact import is_secret_file, is_secret_name, mask_arguments, strip_credentials

SECRET = "hunter2"


def test_secrets_stay_out_of_the_record():
    environ = {
        "WANDB_API_KEY": SECRET,
        "SLURM_JWT": SECRET,
        "DINO_EXP_PASSWORD": SECRET,
        "WANDB_BASE_URL": f"https://me:{SECRET}@host/x",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "HOME": "/home/me",
        "OMP_NUM_THREADS": "2",
        "SLURM_JOB_ID": "17",
    }
    argv = [f"/home/{SECRET}/train.py", f"logger.wandb.api_key={SECRET}", f"--token={SECRET}",
            "--password", SECRET, f"paths.outputs=s3://me:{SECRET}@b/x", "optimizer.lr=1e-3"]  # fmt: skip
    record = environment_record(argv=argv, environ=environ)
    assert SECRET not in json.dumps(record)
    assert record["variables"] == {
        "DINO_EXP_PASSWORD": "***", "OMP_NUM_THREADS": "2", "SLURM_JOB_ID": "17", "SLURM_JWT": "***",
        "WANDB_API_KEY": "***", "WANDB_BASE_URL": "https://host/x",
    }  # fmt: skip
    assert record["argv"] == [
        "train.py", "logger.wandb.api_key=***", "--token=***", "--password", "***", "paths.outputs=s3://b/x",
        "optimizer.lr=1e-3",
    ]  # fmt: skip


def test_the_machine_and_the_versions_are_told():
    record = environment_record(argv=["x"], environ={})
    assert record["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert record["packages"]["numpy"]
    assert record["cpu"]["usable_cores"] >= 1
    assert record["memory_bytes"] > 1 << 20


def test_recording_imports_no_torch():
    program = (
        "import sys; from dino_exp.runs.environment import environment_record as r;"
        "e = r(argv=sys.argv, environ={});"
        "assert 'torch' not in sys.modules and e['torch'] is None and e['packages']['torch']"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_torch_tells_its_build_once_it_is_loaded():
    import torch

    assert environment_record(argv=["x"], environ={})["torch"]["version"] == torch.__version__


@pytest.mark.parametrize(
    ("address", "clean"),
    [
        ("https://user:token@host/x.git", "https://host/x.git"),
        ("https://token@host/x.git", "https://host/x.git"),
        ("https://user:p@ss@host/x", "https://host/x"),
        ("https://host/x?private_token=1#y", "https://host/x"),
        ("https://host/@scope/x", "https://host/@scope/x"),
        ("ssh://git:pw@host/x", "ssh://git@host/x"),
        ("git@host:me/x.git", "git@host:me/x.git"),
        ("HTTPS://u:p@host", "HTTPS://host"),
        ("see http://u:p@a/b and https://c:d@e", "see http://a/b and https://e"),
        ("/srv/git/x.git", "/srv/git/x.git"),
    ],
)
def test_addresses_lose_their_credentials(address, clean):
    assert strip_credentials(address) == clean


def test_a_flag_after_a_secret_flag_is_no_secret():
    assert mask_arguments(["--token", "--verbose", "x"]) == ["--token", "--verbose", "x"]


def test_ordinary_names_are_not_masked():
    names = ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "num_passes", "HYDRA_FULL_ERROR", "optimizer.lr"]
    assert [name for name in names if is_secret_name(name)] == []
    assert all(map(is_secret_name, ["PASS", "DB_PASS", "api_key", "GH_TOKEN", "MY_CREDENTIALS", "passwd"]))


def test_files_that_usually_hold_secrets_are_known_by_name():
    secret = [
        ".env", "prod.env", ".env.local", ".htpasswd", "api_key.txt", "APIKEY", "token_hf.txt", "id_rsa",
        "id_ed25519.old", "server.pem", "my_credentials.json", "client_secret_12.json", "wandb_key.txt",
        "passwords.yaml", ".netrc", "secrets.py", "api_keys.py", "tokens.py",
    ]  # fmt: skip
    assert [name for name in secret if not is_secret_file(name)] == []
    plain = [
        "tokenizer.json", "token_mixer.py", "key_value.py", "environment.yaml", "monkey.txt", "keyboard.md",
        "notes.txt", "train.py", "authors.txt", "attention_keys.py", "config.yaml", "__init__.py",
    ]  # fmt: skip
    assert [name for name in plain if is_secret_file(name)] == []
