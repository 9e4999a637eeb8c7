"""Draws large meshes of a simulation coarser than LIBERO does: half of the time to render one frame. Called by `data.LiberoEnv`."""
import mujoco
import numpy as np


def thin_meshes(sim, grid):
    """Draw large visual meshes coarser: vertices in one cell of `grid` (m) become one. 4 mm change a picture by 0.3 to 1.4 of 255."""
    model, context = sim.model._model, sim._render_context_offscreen
    context.gl_ctx.make_current()  # the upload goes to whatever context is current
    mesh, solid = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH, (model.geom_contype | model.geom_conaffinity) != 0
    seen = np.setdiff1d(model.geom_dataid[mesh], model.geom_dataid[mesh & solid])
    for i in seen[(model.mesh_facenum[seen] >= 8000) & (grid > 0)]:
        vertices = model.mesh_vert[model.mesh_vertadr[i]:][:model.mesh_vertnum[i]]
        faces = slice(model.mesh_faceadr[i], model.mesh_faceadr[i] + model.mesh_facenum[i])
        _, first, cell = np.unique(np.floor(vertices / grid) @ [1, 1e4, 1e8], return_index=True, return_inverse=True)
        vertices[:] = vertices[first][cell]
        corners = cell[model.mesh_face[faces]]
        kept = np.flatnonzero((corners != np.roll(corners, 1, axis=1)).all(1))  # the others have become lines or points
        for array in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord):
            array[faces][:len(kept)] = array[faces][kept]
        model.mesh_facenum[i] = len(kept)
        mujoco.mjr_uploadMesh(model, context.con, int(i))
