"""The recipe and its yamls, copied to a folder of one's own.

> python -m lgl_plugin.copy_recipe my_recipe
> cd my_recipe
> python train_lgl.py hparams/stage1.yaml --data_folder=/path/to/VoxCeleb

The package carries them, so that whoever installs it by pip alone has the
scripts to run and the yamls to change.
"""

import argparse
import pathlib
import shutil

# In a checkout a link to recipes/VoxCeleb/LGL; a wheel holds the files.
RECIPE = pathlib.Path(__file__).parent / "recipe"
PATTERNS = ("*.py", "*.md", "*/*.yaml")


def copy_recipe(folder, overwrite=False):
    """Copies the recipe.

    Arguments
    ---------
    folder : str or pathlib.Path
        Where to; made if it is missing.
    overwrite : bool
        Whether files of the recipe that are there already are replaced.

    Returns
    -------
    list of pathlib.Path
        The copies.

    Raises
    ------
    FileExistsError
        If one of the files is there and is not to be replaced; nothing is
        copied then.

    Example
    -------
    >>> copies = copy_recipe(getfixture("tmp_path") / "mine")
    >>> {"train_lgl.py", "stage2.yaml"} < {path.name for path in copies}
    True
    """
    folder = pathlib.Path(folder)
    sources = [path for pattern in PATTERNS for path in RECIPE.glob(pattern)]
    copies = [folder / path.relative_to(RECIPE) for path in sources]
    present = [str(path) for path in copies if path.exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"these files are there already: {', '.join(sorted(present))}. "
            "Name another folder, or replace them with --overwrite."
        )
    for source, copy in zip(sources, copies):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return copies


def main(arguments=None):
    """Copies the recipe from the command line.

    Example
    -------
    >>> import contextlib
    >>> folder = getfixture("tmp_path") / "mine"
    >>> with contextlib.redirect_stdout(None):
    ...     main([str(folder)])
    >>> (folder / "train_lgl.py").exists()
    True
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where to copy it")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of the recipe that are there already",
    )
    options = parser.parse_args(arguments)
    try:
        copies = copy_recipe(options.folder, options.overwrite)
    except FileExistsError as error:
        parser.error(str(error))
    print(
        f"{len(copies)} files are in {options.folder}. What to do next:\n"
        f"  cd {options.folder}\n"
        "  python train_lgl.py hparams/stage1.yaml --data_folder=/path/to/audio"
    )


if __name__ == "__main__":
    main()
