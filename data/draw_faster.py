"""Draws the scenes of LIBERO up to three times as fast, alike to the eye. Called by `data.LiberoEnv`."""
import mujoco
import numpy as np

WHITE = 1.17, 1.155, 1.135, 1  # what LIBERO's stove mirrors, but for the arm: a wall in the light


def draw_faster(sim, grid):
    """Draw large visual meshes coarser: vertices in one cell of `grid` (m) become one; and mirrors white. 0: LIBERO's own scene."""
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
    if grid > 0:
        blind_mirrors(model)


def blind_mirrors(model):
    """MuJoCo draws everything once more for a box that reflects, in LIBERO the stove. Where it mirrors plain walls (Goal, Spatial; not the
    kitchen of Long), put a white plate on it: a site, because it moves nothing, and the table's, because LIBERO hides those of things."""
    names = [model.geom(i).name for i in range(model.ngeom)], [model.site(i).name for i in range(model.nsite)]
    if "wall_leftcorner_visual" in names[0] and "flat_stove_1_base_vis" in names[0]:
        mirror, site = names[0].index("flat_stove_1_base_vis"), names[1].index("table_top")
        model.site_type[site], model.site_bodyid[site] = mujoco.mjtGeom.mjGEOM_BOX, model.geom_bodyid[mirror]
        model.site_pos[site], model.site_quat[site] = model.geom_pos[mirror] + [0, 0, model.geom_size[mirror, 2]], model.geom_quat[mirror]
        model.site_size[site], model.site_rgba[site] = [*model.geom_size[mirror, :2], 4e-4], WHITE
        model.site_sameframe[site], model.mat_reflectance[model.geom_matid[mirror]] = 0, 0
