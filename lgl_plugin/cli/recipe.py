"""`lgl recipe`: copies the training recipe and its yamls to a new folder.

> lgl recipe my_recipe
> cd my_recipe
> python train_lgl.py hparams/stage1.yaml --data_folder=/path/to/VoxCeleb
"""

import argparse
import importlib.util
import pathlib
import types

# A link to recipes/VoxCeleb/LGL in a checkout, a folder of files in a wheel.
RECIPE = pathlib.Path(__file__).parents[1] / "recipe"
PATTERNS = ("*.py", "*.sh", "*.md", "*/*.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("folder", help="where to copy the recipe")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of the recipe that are there already",
    )


def run(folder: str, overwrite: bool = False) -> None:
    """Copies the recipe and says what to do next."""
    copies = copy_recipe(folder, overwrite)
    print(
        f"{len(copies)} files are in {folder}. What to do next:\n"
        f"  cd {folder}\n"
        "  python train_lgl.py hparams/stage1.yaml --data_folder=/path/to/audio"
    )


def copy_recipe(
    folder: str | pathlib.Path, overwrite: bool = False
) -> list[pathlib.Path]:
    """Copies the recipe's scripts and yamls.

    Arguments
    ---------
    folder : str or pathlib.Path
        The target folder; made if it does not exist.
    overwrite : bool
        Whether to replace files of the recipe that exist already.

    Returns
    -------
    list of pathlib.Path
        The copies.

    Raises
    ------
    FileExistsError
        If another file would be replaced and `overwrite` is False. Then nothing
        is copied.
    OSError
        If the folder cannot be written. The same call again continues.

    Example
    -------
    >>> copies = copy_recipe(getfixture("tmp_path") / "mine")
    >>> "train_lgl.py" in [path.name for path in copies]
    True
    """
    from lgl_plugin.utils.files import atomic_write

    folder = pathlib.Path(folder)
    sources = [path for pattern in PATTERNS for path in RECIPE.glob(pattern)]
    copies = [folder / path.relative_to(RECIPE) for path in sources]
    contents = [path.read_bytes() for path in sources]
    # A file that equals its source does not count as present: otherwise a call
    # that a full disk ended could not be repeated.
    present = [
        str(path)
        for path, content in zip(copies, contents)
        if path.exists()
        and not (path.is_file() and path.read_bytes() == content)
    ]
    if present and not overwrite:
        raise FileExistsError(
            f"these files are there already: {', '.join(sorted(present))}. "
            "Name another folder, or replace them with --overwrite."
        )
    for copy, content in zip(copies, contents):
        with atomic_write(copy, "wb") as out:
            out.write(content)
    return copies


def load_recipe() -> types.ModuleType:
    """Imports the recipe's train_lgl.py by its path.

    It is a script and no module of the package: in a checkout it lies in a
    linked folder.
    """
    path = RECIPE / "train_lgl.py"
    spec = importlib.util.spec_from_file_location("train_lgl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
