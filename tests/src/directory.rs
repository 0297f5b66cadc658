//! A configuration directory that is gone with the value.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{binary, unique};

const NOBODY: u32 = 65_534;

/// A configuration directory.
#[derive(Debug)]
pub struct Directory {
    folder: TempDir,
}

impl Directory {
    /// An empty one, which every user may read.
    ///
    /// # Errors
    /// There is no room.
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix(&unique("files-")).tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        Ok(Self { folder })
    }

    /// A command that runs `portolan` as a user who may do nothing.
    ///
    /// # Errors
    /// It was not built.
    pub fn portolan_as_nobody(&self) -> Result<Command> {
        // Where it was built, that user may not even look.
        let copy = self.scratch("portolan");
        if !copy.exists() {
            // By another process: were it written here, a child of another thread could hold it open for writing, and it could not be run.
            let status = Command::new("cp").arg(binary("portolan")?).arg(&copy).status()?;
            ensure!(status.success(), "cp ended with {status}");
        }
        let mut command = Command::new(copy);
        command.uid(NOBODY).gid(NOBODY);
        Ok(command)
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("config")
    }

    /// `portolan plan` for a node: the answer, and the exit status. It runs as a user who may do nothing.
    ///
    /// # Errors
    /// It says neither that all is well nor that there are findings.
    pub fn plan(&self, cluster: &str, node: &str, more: &[&str]) -> Result<(Value, i32)> {
        let mut command = self.portolan_as_nobody()?;
        command.arg("plan").arg("--config").arg(self.path()).args(["--cluster", cluster, "--node", node, "-o", "json"]);
        let output = command.args(more).output()?;
        let code = output.status.code().unwrap_or(-1);
        ensure!((0..=1).contains(&code), "plan ended with {code}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((serde_json::from_slice(&output.stdout).context(text)?, code))
    }

    /// A place for other files of the test.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts objects into a file (`c1/services.yaml`), in one step, as a careful writer does.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, file: &str, objects: &[Value]) -> Result<()> {
        let documents: Vec<String> = objects.iter().map(|object| format!("{object:#}\n")).collect();
        self.write_text(file, &documents.join("---\n"))
    }

    /// Puts text into a file, in one step.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_text(&self, file: &str, text: &str) -> Result<()> {
        let path = self.path().join(file);
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)?;
        let draft = folder.join(format!(".{}.draft", path.file_name().unwrap_or_default().display()));
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The objects that were put into files of a folder, not those of the folders in it.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn objects(&self, folder: &str) -> Result<Vec<Value>> {
        let mut objects = Vec::new();
        for entry in fs::read_dir(self.path().join(folder))?.flatten() {
            let is_draft = entry.file_name().to_string_lossy().starts_with('.');
            if is_draft || !entry.path().is_file() {
                continue;
            }
            for document in fs::read_to_string(entry.path())?.split("---\n") {
                objects.push(serde_json::from_str(document).context("it was not written by this test")?);
            }
        }
        Ok(objects)
    }

    /// Removes a file.
    ///
    /// # Errors
    /// It is not there.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.path().join(file)).with_context(|| format!("cannot remove {file}"))
    }
}
